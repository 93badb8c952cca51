"""The job in FLARE's own idiom, for those who come from its recipes.

`python jobs/job.py jobs/demo/job.toml` runs it in FLARE's simulator with the sites of the `site.toml` beside it;
`python jobs/job.py jobs/demo/job.toml --export --export-dir DIR` writes the job folder. `fedmpt simulate` and
`fedmpt export` do the same with checks, progress and results.
"""

import sys
import tempfile
from pathlib import Path

from nvflare.recipe import SimEnv

from fedmpt_core.config.toml import load_job, load_sites
from fedmpt_flare.job.recipe import FedMPTRecipe  # FLARE takes --export and --export-dir off the command line here
from fedmpt_flare.job.simulation import prepare_workspace

if __name__ == "__main__":
    path = Path(sys.argv[1])
    job, sites = load_job(path), load_sites(path.parent / "site.toml")
    workspace = Path(tempfile.mkdtemp(prefix="fedmpt-"))
    prepare_workspace(job, sites, workspace, keep=workspace)
    env = SimEnv(clients=list(sites), num_threads=len(sites), workspace_root=str(workspace))
    FedMPTRecipe(job).execute(env)
