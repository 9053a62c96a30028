"""The audit of an unlearned model, and its report."""

from __future__ import annotations

from mtu_fast.unlearning.report.audit import audit
from mtu_fast.unlearning.report.result import Audit, write_html

__all__ = ["Audit", "audit", "write_html"]
