"""The checker of types at run time: beartype, which takes an int for a float."""

import beartype

checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
