# SPDX-License-Identifier: Apache-2.0
"""Methods of others that PEFT does not have, written once for SwinV2 and ViT: rows beside SFA.

One file each; `PEERS` has them by the name that `--method` takes. What PEFT has comes from PEFT
(`of_peft.py`).
"""

from common.peers.adapter_plus import ADAPTER_PLUS
from common.peers.adaptformer import ADAPTFORMER
from common.peers.bitfit import BITFIT
from common.peers.mona import MONA
from common.peers.ssf import SSF
from common.peers.vpt import VPT

PEERS = {
    "bitfit": BITFIT,
    "ssf": SSF,
    "vpt": VPT,
    "adaptformer": ADAPTFORMER,
    "adapter_plus": ADAPTER_PLUS,
    "mona": MONA,
}
