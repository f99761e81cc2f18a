"""What a policy did: groups of responses, sampled, judged, chosen, measured, made into batches."""
