"""The engine kind `command`: any server with the OpenAI API that ``--engine-command`` starts."""
