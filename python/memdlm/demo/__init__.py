"""The demo: MDLM and MemDLM side by side on English that every machine has."""
