"""The verbs of akd-dist, as functions: what the commands do, and no more. See `akd_dist`.

What a verb takes, as arguments and as options of its command, is written once, in `akd_dist.options`. Importing this
package is instant: each verb imports what it needs when it is called.
"""

from akd_dist.api.models import (
    evaluate as evaluate,
    export as export,
    generate as generate,
    import_model as import_model,
    load_model as load_model,
    predict as predict,
)
from akd_dist.api.rows import (
    distillation_batches as distillation_batches,
    distillation_dataset as distillation_dataset,
    open_store as open_store,
    ray_dataset as ray_dataset,
    source_rows as source_rows,
)
from akd_dist.api.runs import (
    cache_teacher as cache_teacher,
    compare as compare,
    import_logits as import_logits,
    plan as plan,
    report as report,
    train_students as train_students,
    tune as tune,
)
