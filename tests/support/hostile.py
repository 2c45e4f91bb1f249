"""Text and JSON that attack whatever reads them."""

from __future__ import annotations

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> \u202eevil\x1b[31m "
    "<!--<script> &lt;b&gt; {{ 7*7 }} \ud800 #### 7"
)
DEEP = b"[" * 1_000_000 + b"]" * 1_000_000
