"""The library that the stage scripts read like sentences from. See README.md for the tour."""
