"""Where does response length go under GSPO and LUSPO, and why."""
