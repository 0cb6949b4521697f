"""The zoo: one file is one plugin module is one idea, with its paper."""
