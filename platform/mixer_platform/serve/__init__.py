"""Serve: photos in over HTTP, similar items out, from a published index, on Ray Serve.

`app.py` binds the graph: one `Ingress` (HTTP), one `QueryEncoder`, one `ShardApart` a shard, each autoscaled.
`service.py` is a query's way through it, `api.py` the HTTP side, `payload.py` what requests hold, `schemas.py` what
replies hold, `job.py` puts it on a cluster.
"""
