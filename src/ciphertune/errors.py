"""Every error the package raises on purpose.

CiphertuneError                 one clear line: what was wrong, with which value, and what to do
├── SettingsError               an override, a choice or a node's own setting
├── DataError                   a data file, a line in it, a label
├── ModelError                  a model folder, a target module, a rank
├── KeyFileError                a key file, an offer of one or an identity: absent, damaged, readable by others
├── RangeError                  a value that encryption could not carry (NaN, infinite, too large)
├── WireError                   a message that must not be used
│   ├── FormatError             not ours, wrong version, wrong length, damaged
│   │   └── ReportError         a figure in a client's report that is none
│   ├── ParameterMismatchError  encrypted under other parameters
│   ├── KeyMismatchError        encrypted under another key
│   ├── PlanMismatchError       made for another plan (layers, shapes, ranks)
│   │   └── DisagreementError   two clients contradict each other, and nobody can tell which one is wrong
│   ├── SettingsMismatchError   made under other settings
│   └── RoundMismatchError      another run, round or sender; a replay
├── StateError                  a file that a run or a client keeps for itself cannot be read back
├── ResumeError                 an earlier run that cannot be gone on with: unknown, finished, other settings, damaged
└── FederationError             the run cannot go on (too few clients, nothing usable in a round)
    └── TooFewError             a round has too few usable updates: nothing was released, it can be tried again
"""


class CiphertuneError(Exception):
    """Base of all errors that a user can do something about."""


class SettingsError(CiphertuneError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(CiphertuneError):
    """Training data cannot be used as given."""


class ModelError(CiphertuneError):
    """The base model cannot be loaded or adapted as asked."""


class KeyFileError(CiphertuneError):
    """A key file, an offer of a key or an identity cannot be used."""


class RangeError(CiphertuneError):
    """A value is not finite or exceeds what the encryption parameters can carry."""


class WireError(CiphertuneError):
    """A message must not be used."""


class FormatError(WireError):
    """The bytes are not a message of this wire version."""


class ReportError(FormatError):
    """A figure in a client's report is not a number in its range. An honest client's model may have diverged."""


class ParameterMismatchError(WireError):
    """The message was made under other encryption parameters."""


class KeyMismatchError(WireError):
    """The message was made under another key."""


class PlanMismatchError(WireError):
    """The message was made for another plan."""


class DisagreementError(PlanMismatchError):
    """Two clients contradict each other, and nobody can tell which one is wrong."""


class SettingsMismatchError(WireError):
    """The two parties run under different settings or code."""


class RoundMismatchError(WireError):
    """The message belongs to another run, round or sender."""


class StateError(CiphertuneError):
    """A file that a run or a client keeps for itself cannot be read back."""


class ResumeError(CiphertuneError):
    """An earlier run cannot be gone on with."""


class FederationError(CiphertuneError):
    """The run cannot go on."""


class TooFewError(FederationError):
    """A round has too few usable updates: nothing was released, and it can be tried again."""
