"""gRPC's own health checks: `shop.v1.Cart` serves, and `shop.v1.Orders` does not. Says its port on the first line, and ends with its input."""

import sys
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

server = grpc.server(futures.ThreadPoolExecutor(4))
checks = health.HealthServicer()
health_pb2_grpc.add_HealthServicer_to_server(checks, server)
checks.set("", health_pb2.HealthCheckResponse.SERVING)
checks.set("shop.v1.Cart", health_pb2.HealthCheckResponse.SERVING)
checks.set("shop.v1.Orders", health_pb2.HealthCheckResponse.NOT_SERVING)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
server.stop(None)
