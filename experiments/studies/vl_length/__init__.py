"""Where does response length go when a vision-language policy is trained?"""
