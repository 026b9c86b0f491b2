"""diffusers ships no types; see the stub of the package."""

from diffusers.utils import logging as logging
