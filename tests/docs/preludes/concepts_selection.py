# SPDX-License-Identifier: Apache-2.0
from sfa_peft.selection import scores

monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
