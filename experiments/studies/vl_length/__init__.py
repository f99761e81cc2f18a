"""How response length changes when a vision-language policy is trained."""
