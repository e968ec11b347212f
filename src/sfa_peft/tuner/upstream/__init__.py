# SPDX-License-Identifier: Apache-2.0
"""All that leans on the insides of PEFT and transformers; docs/concepts/house.md lists it."""
