"""How response length changes under GSPO and LUSPO, and why."""
