"""MLflow's server with pages for trainings: an application of ``mlflow server --app-name mvhpc``.

MLflow opens its pages for language models, and its assistant, in a browser that it does not know. The page served here
sets both aside at the first visit; whoever chooses them later keeps them. The bare address opens the list of
experiments. Everything else is MLflow's, with its password.
"""

from pathlib import Path
from typing import Any

from flask import Response
from mlflow.server import app
from mlflow.server.auth import create_app as with_password

FIRST_VISIT = """<script>
for (const [key, value] of [
  ["mlflow.workflowType_v1", '"machine_learning"'],
  ["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true"],
]) if (localStorage.getItem(key) === null) localStorage.setItem(key, value);
if (!location.hash) location.hash = "#/experiments";
</script>"""


def create_app() -> Any:
    """The application (ASGI), for ``mlflow server``."""
    app.view_functions["serve"] = _page  # of the address "/"
    return with_password(app)


def _page() -> Response:
    page = Path(str(app.static_folder), "index.html").read_text()
    return Response(page.replace("<head>", "<head>" + FIRST_VISIT, 1), headers={"Cache-Control": "no-store"})
