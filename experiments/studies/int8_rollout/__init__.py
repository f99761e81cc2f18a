"""Does learning suffer when the sampler's weights are int8, with and without TIS?"""
