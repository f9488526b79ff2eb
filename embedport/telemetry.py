"""onnxruntime's telemetry: off, unless the user turns it on.

On import, onnxruntime 1.29 and later write a device id and a database of events into the user's
cache folder, and later send the events to Microsoft. The variable stops that if it is set before
the import; the function, after it.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "ORT_DISABLE_TELEMETRY"


def turn_off_telemetry() -> None:
    """Turn telemetry off; call it before onnxruntime is imported.

    A user who wants it sets ORT_DISABLE_TELEMETRY=0, which stays as it is.
    """
    if VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = "1"
    if "onnxruntime" in sys.modules:  # another package imported it
        sys.modules["onnxruntime"].disable_telemetry_events()
