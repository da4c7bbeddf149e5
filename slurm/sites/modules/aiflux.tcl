#%Module
# Modulefile of AI-Flux for Environment Modules. Copy it to DIR/aiflux/VERSION, where DIR is in
# MODULEPATH, and set the prefix, in which install.py of a bundle installed AI-Flux (docs/installation.md).
set prefix /sw/aiflux

proc ModulesHelp {} {
    puts stderr "Run an open language model over a file of prompts: aiflux --help"
}
module-whatis "Run an open language model over a file of prompts on this cluster"

conflict aiflux
# module load apptainer
prepend-path PATH $prefix/bin
setenv AIFLUX_SITE_CONFIG $prefix/site.yaml
