"""An example for the help of each command that has none of its own."""

from __future__ import annotations

EXAMPLES = {
    "aiflux doctor": "aiflux doctor --json",
    "aiflux config": "aiflux config show",
    "aiflux config show": "aiflux config show --json",
    "aiflux config init": "aiflux config init --user",
    "aiflux image": "aiflux image info",
    "aiflux image build": "aiflux image build --base docker --output aiflux.sif",
    "aiflux image sign": "aiflux image sign aiflux.sif",
    "aiflux image info": "aiflux image info aiflux.sif",
    "aiflux models": "aiflux models pull llama3.2:3b",
    "aiflux models list": "aiflux models list --fits 40GB",
    "aiflux models show": "aiflux models show llama3.3:70b --slots 16",
    "aiflux models pull": "aiflux models pull llama3.2:3b",
    "aiflux models verify": "aiflux models verify llama3.2:3b",
    "aiflux models export": "aiflux models export llama3.2:3b llama.tar",
    "aiflux models import": "aiflux models import llama.tar",
    "aiflux models remove": "aiflux models remove llama3.2:3b",
    "aiflux bundle": "aiflux bundle create --model llama3.2:3b -o bundle.tar",
    "aiflux bundle create": "aiflux bundle create --model llama3.2:3b -o bundle.tar",
    "aiflux bundle install": "aiflux bundle install bundle.tar --prefix /sw/aiflux",
    "aiflux bundle verify": "aiflux bundle verify bundle.tar",
    "aiflux jobs": "aiflux jobs --all",
    "aiflux results show": "aiflux results show results.json --failed",
}
