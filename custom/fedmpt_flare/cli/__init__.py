"""The `fedmpt` command, one module a command."""
