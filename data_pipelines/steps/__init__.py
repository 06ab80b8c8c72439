"""One step of a recipe per file, each a datatrove PipelineStep that works alone.

A document that is dropped is not taken out of the stream: `drop()` marks it with its reason, later steps let
it pass, and the last step counts it. So what was read is what was kept plus what was dropped, by reason, and
nothing can be lost without a word.
"""
