"""The storage floor: logits as a chunked Zarr v3 store, published once and never overwritten.

Import it as `akd_dist.storage`. This floor knows zarr, numcodecs and obstore, and nothing of torch or ray.
"""

if __name__ == "storage":
    raise ImportError("import akd_dist.storage, not storage: one module must have one name")
