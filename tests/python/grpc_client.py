"""A generic gRPC client: it knows no .proto file, learns the services by reflection, and calls them.

usage: grpc_client.py URL MODEL
"""

import sys

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

ADDRESS, MODEL = sys.argv[1].removeprefix("http://"), sys.argv[2]
channel = grpc.insecure_channel(ADDRESS)
database = ProtoReflectionDescriptorDatabase(channel)
pool = DescriptorPool(database)


def call(service, method, request, timeout=300):
    """The replies to `request` (plain data), as plain data."""
    described = pool.FindServiceByName(service).FindMethodByName(method)
    ask, answer = GetMessageClass(described.input_type), GetMessageClass(described.output_type)
    make = channel.unary_stream if described.server_streaming else channel.unary_unary
    function = make(f"/{service}/{method}", request_serializer=ask.SerializeToString, response_deserializer=answer.FromString)
    replies = function(json_format.ParseDict(request, ask()), timeout=timeout)
    if not described.server_streaming:
        replies = [replies]
    return [json_format.MessageToDict(reply, preserving_proto_field_name=True) for reply in replies]


def refused(code, word, *args):
    try:
        call(*args)
    except grpc.RpcError as error:
        assert error.code() == code and word in error.details(), error
        return
    raise AssertionError(f"{args} was not refused")


SERVICE = "skein.v1.Inference"
services = database.get_services()
assert SERVICE in services and "grpc.health.v1.Health" in services, services
print("ok reflection:", ", ".join(sorted(services)))

assert call("grpc.health.v1.Health", "Check", {}) == [{"status": "SERVING"}]
assert call("grpc.health.v1.Health", "Check", {"service": SERVICE}) == [{"status": "SERVING"}]
print("ok health")

[info] = call(SERVICE, "ModelInfo", {"model": MODEL})
assert info["model"] == MODEL and info["vocab"] == 262144 and 1 in info["end_ids"] and info["has_chat_template"], info
[ids] = call(SERVICE, "Tokenize", {"model": MODEL, "text": "The capital of France is", "add_special_tokens": True})
assert ids["ids"] == [2, 818, 5279, 529, 7001, 563], ids
print("ok model info, tokenize")

greedy = {"model": MODEL, "text": "The capital of France is", "max_tokens": 8, "sampling": {"temperature": 0}, "logprobs": 2}
replies = call(SERVICE, "Generate", greedy)
tokens = [token for reply in replies for token in reply.get("tokens", [])]
assert [token["id"] for token in tokens] == [506, 5279, 529, 506, 2891, 529, 7001, 236761], tokens
assert all(token["logprob"] < 0 and len(token["top"]) == 2 for token in tokens), tokens
assert "".join(reply.get("text", "") for reply in replies) == " the capital of the country of France."
assert replies[-1]["finish_reason"] == "length", replies[-1]
assert replies[-1]["usage"]["prompt_tokens"] == 6 and replies[-1]["usage"]["completion_tokens"] == 8, replies[-1]
from_ids = {**greedy, "ids": ids}
del from_ids["text"]
assert [t["id"] for r in call(SERVICE, "Generate", from_ids) for t in r.get("tokens", [])] == [t["id"] for t in tokens]
stopped = call(SERVICE, "Generate", {**greedy, "stop": ["country"]})
assert stopped[-1]["finish_reason"] == "stop" and "".join(r.get("text", "") for r in stopped) == " the capital of the ", stopped
chat = {"model": MODEL, "chat": {"messages": [{"role": "user", "content": "Hello"}]}, "max_tokens": 4}
assert call(SERVICE, "Generate", chat)[-1]["usage"]["completion_tokens"] >= 1
print("ok generate")

refused(grpc.StatusCode.NOT_FOUND, "absent", SERVICE, "Generate", {**greedy, "model": "absent"})
refused(grpc.StatusCode.INVALID_ARGUMENT, "temperature", SERVICE, "Generate", {**greedy, "sampling": {"temperature": -1}})
print("ok errors")
