"""Tasks as pairs of prompts, patching, and circuits: tables and records, no figures."""
