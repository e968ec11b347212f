# SPDX-License-Identifier: Apache-2.0
from sfa_peft import SFAConfig
