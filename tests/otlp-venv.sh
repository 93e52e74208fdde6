#!/bin/sh
# Makes target/otlp-venv, where the tests' OTLP collector has what it needs; tests that run at once wait for each other.
set -eu
cd "$(dirname "$0")/.."
mkdir -p target
exec 9>target/otlp-venv.lock
flock 9
target/otlp-venv/bin/python -c 'import grpc, opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc' 2>/dev/null && exit 0
rm -rf target/otlp-venv
tests/need.sh python3-venv
python3 -m venv target/otlp-venv
target/otlp-venv/bin/pip install -q grpcio==1.85.3 opentelemetry-proto==1.45.2
