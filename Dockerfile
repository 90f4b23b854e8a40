# syntax=docker/dockerfile:1
# Images of Skein: `docker build --target skein .` for routers and workers, `docker build --target operator .` for the operator.
#
# Each holds one program, the shared libraries that it is linked with, and an account; no shell, no package manager, no certificates (TLS brings its own
# roots). `cargo xtask cluster load-image` writes images of the same layout without Docker.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --package cli --bin skein --package operator --bin skein-operator \
    && mkdir /built && cp target/release/skein target/release/skein-operator /built/
# The loader and libraries by the paths that `ldd` gives, links followed.
RUN set -eu; for program in skein skein-operator; do \
        root="/image/$program"; \
        install -D -m 0755 "/built/$program" "$root/$program"; \
        strip "$root/$program"; \
        ldd "/built/$program" | grep -o '/[^ ]*' | while read -r library; do install -D -m 0755 "$library" "$root$library"; done; \
        install -d -m 1777 "$root/tmp"; \
        install -d "$root/etc"; \
        printf 'root:x:0:0:root:/:/sbin/nologin\nskein:x:65532:65532:skein:/:/sbin/nologin\n' > "$root/etc/passwd"; \
        printf 'root:x:0:\nskein:x:65532:\n' > "$root/etc/group"; \
        printf 'hosts: files dns\n' > "$root/etc/nsswitch.conf"; \
    done

FROM scratch AS operator
COPY --from=build /image/skein-operator /
USER 65532:65532
ENTRYPOINT ["/skein-operator"]

FROM scratch AS skein
COPY --from=build /image/skein /
USER 65532:65532
ENTRYPOINT ["/skein"]
