"""Do low-rank adapters have the length dynamics of full weights, under LUSPO and GSPO?"""
