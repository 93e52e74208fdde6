"""A collector of OTLP over gRPC: a JSON line for each span on standard output, behind one that says the port."""

import json
import sys
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc


def value(any_value):
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return [value(item) for item in any_value.array_value.values]
    return getattr(any_value, kind) if kind else None


def attributes(pairs):
    return {pair.key: value(pair.value) for pair in pairs}


class Collector(trace_grpc.TraceServiceServicer):
    def Export(self, request, context):
        refused = 0
        metadata = {pair.key: pair.value for pair in context.invocation_metadata()}
        for resource_spans in request.resource_spans:
            resource = attributes(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    line = {
                        "resource": resource,
                        "scope": scope_spans.scope.name,
                        "key": metadata.get("x-key"),
                        "trace_id": span.trace_id.hex(),
                        "span_id": span.span_id.hex(),
                        "parent_id": span.parent_span_id.hex(),
                        "name": span.name,
                        "kind": span.kind,
                        "start": span.start_time_unix_nano,
                        "end": span.end_time_unix_nano,
                        "status": span.status.code,
                        "state": span.trace_state,
                        "attributes": attributes(span.attributes),
                    }
                    print(json.dumps(line), flush=True)
                    refused += line["attributes"].get("url.path") == "/unwanted"
        response = trace_service.ExportTraceServiceResponse()
        if refused:
            response.partial_success.rejected_spans = refused
            response.partial_success.error_message = "not these"
        return response


server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
trace_grpc.add_TraceServiceServicer_to_server(Collector(), server)
port = server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
server.start()
print(port, flush=True)
# Until the test lets go of it.
sys.stdin.read()
server.stop(None)
