"""Spack recipe of AI-Flux: installs a bundle, which you create first on a machine with internet
(docs/installation.md)."""

import os

from spack.package import depends_on, license, version, which
from spack_repo.builtin.build_systems.generic import Package


class Aiflux(Package):
    """Run an open language model over a file of prompts on a Slurm cluster."""

    homepage = "(none yet)"
    url = f"file://{os.getcwd()}/aiflux-1.0.0.tar"
    manual_download = True  # the bundle, in the current directory or in a mirror

    license("MIT")

    # To require a bundle of yours, add sha256="...", as `aiflux bundle create` printed it.
    version("1.0.0", extension="tar", expand=False)

    depends_on("python@3.10:3.14", type=("build", "run"))

    download_instr = "create the bundle with: aiflux bundle create -o aiflux-1.0.0.tar"

    def install(self, spec, prefix):
        bundle, installer = self.stage.archive_file, "aiflux-bundle/install.py"
        which("tar", required=True)("-xf", bundle, installer)
        # To share the models among versions: "--models-dir", "/sw/aiflux/models"
        spec["python"].command(installer, bundle, "--prefix", prefix)

    def setup_run_environment(self, env):
        env.set("AIFLUX_SITE_CONFIG", self.prefix.join("site.yaml"))
