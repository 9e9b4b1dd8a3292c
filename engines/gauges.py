"""Names and meanings of a batcher's gauges, which every server tells Prometheus alike: dashboards and autoscaling hold on to them."""

from __future__ import annotations

__all__ = ["GAUGES"]

GAUGES = {  # field of BatcherStats: name and meaning
    "queued": ("vflow_requests_queued", "Requests that wait for a slot."),
    "active": ("vflow_requests_active", "Requests in a slot."),
    "slots": ("vflow_slots", "Requests that are answered at a time."),
    "queue_limit": ("vflow_queue_limit", "Requests that may wait."),
    "kv_bytes_used": ("vflow_kv_cache_bytes_used", "KV caches of slots in use."),
    "kv_bytes": ("vflow_kv_cache_bytes", "KV caches of all slots."),
}
