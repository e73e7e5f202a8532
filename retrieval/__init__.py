"""Documents -> chunks -> vectors -> Milvus -> passages -> grounded prompt. Imports only the floor (`cluster`)."""
