"""The JSON documents that commands print and that runs leave behind, as pydantic models: one file for each command.

How a document comes about lies with who makes it; here are its fields, and how one that lies on a disk is read back.
"""
