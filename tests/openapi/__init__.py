"""Whether the service is what `/openapi.json` says: requests made from the description, sent to the
application in process, each answer held against it. `python -m tests.openapi` looks for longer."""
