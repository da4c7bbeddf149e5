-- Modulefile of AI-Flux for Lmod. Copy it to DIR/aiflux/VERSION.lua, where DIR is in MODULEPATH, and
-- set the prefix, in which install.py of a bundle installed AI-Flux (docs/installation.md).
local prefix = "/sw/aiflux"

help("Run an open language model over a file of prompts: aiflux --help")
whatis("Name: AI-Flux")
whatis("Description: Run an open language model over a file of prompts on this cluster")

conflict("aiflux")
-- depends_on("apptainer")
prepend_path("PATH", pathJoin(prefix, "bin"))
setenv("AIFLUX_SITE_CONFIG", pathJoin(prefix, "site.yaml"))
