//! Container images written without Docker: programs and the shared libraries they need, as the `Dockerfile` packs them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{
    archive::{self, Entry, Image},
    folder::Cluster,
    packages,
};
use crate::{
    paths,
    process::{cargo, command, output, run, say},
};

/// The image whose container holds a pod's namespaces.
pub(crate) const PAUSE: &str = "docker.io/skein/pause:dev";
/// The image of routers and workers, as the chart names it.
const SKEIN: &str = concat!("docker.io/skein/skein:", env!("CARGO_PKG_VERSION"));
/// The image of the operator.
const OPERATOR: &str = concat!("docker.io/skein/operator:", env!("CARGO_PKG_VERSION"));

/// User and group that containers run as.
const USER: u32 = 65532;

/// Imports the image that every pod needs.
///
/// # Errors
/// If busybox is missing or containerd does not take the image.
pub(crate) fn load_pause(cluster: &Cluster) -> Result<()> {
    let image = image(PAUSE, &packages::path("busybox")?, &["sleep", "infinity"])?;
    import(cluster, &image)
}

/// Skein's programs: package, program, image.
const PROGRAMS: [(&str, &str, &str); 2] = [("cli", "skein", SKEIN), ("operator", "skein-operator", OPERATOR)];

/// Builds Skein's programs and imports their images.
///
/// # Errors
/// If a build fails or containerd does not take an image.
pub(crate) fn build_and_load(cluster: &Cluster) -> Result<()> {
    let folder = paths::built()?;
    for (package, program, _) in PROGRAMS {
        say(&format!("building {program}"));
        let mut build = cargo();
        build.args(["build", "--quiet", "--package", package, "--bin", program]);
        // Where this program was built, whatever the environment says now: the file that is packed is the one just built.
        build.arg("--target-dir").arg(folder.parent().context("xtask was built in no target folder")?);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        run(&mut build)?;
    }
    load(cluster)
}

/// Imports the images of Skein's programs as they were built last.
///
/// # Errors
/// If one was not built or containerd does not take an image.
pub(crate) fn load(cluster: &Cluster) -> Result<()> {
    let folder = paths::built()?;
    for (_, program, reference) in PROGRAMS {
        say(&format!("loading {reference}"));
        import(cluster, &image(reference, &folder.join(program), &[])?)?;
    }
    Ok(())
}

/// An image of `program`, which it runs with `args` by default.
fn image(reference: &str, program: &Path, args: &[&str]) -> Result<Image> {
    let name = program.file_name().context("a program without a name")?.to_string_lossy().into_owned();
    // Libraries change with the machine and programs with every build, so each has a layer of its own.
    let mut base = vec![
        Entry::text("etc/passwd", format!("root:x:0:0:root:/:/sbin/nologin\nskein:x:{USER}:{USER}:skein:/:/sbin/nologin\n")),
        Entry::text("etc/group", format!("root:x:0:\nskein:x:{USER}:\n")),
        Entry::text("etc/nsswitch.conf", "hosts: files dns\n".to_owned()),
        Entry::folder("tmp", 0o1777),
    ];
    for (at, file) in libraries(program)? {
        base.push(Entry::file(at.to_string_lossy().trim_start_matches('/'), file));
    }
    let mut entrypoint = vec![format!("/{name}")];
    entrypoint.extend(args.iter().map(ToString::to_string));
    Ok(Image {
        reference: reference.to_owned(),
        layers: vec![base, vec![Entry::program(&name, program.to_path_buf())]],
        config: json!({"Entrypoint": entrypoint, "User": format!("{USER}:{USER}"), "WorkingDir": "/"}),
    })
}

/// The shared libraries that `program` is linked with and its loader: where each is found in an image, and the file that it is.
fn libraries(program: &Path) -> Result<BTreeMap<PathBuf, PathBuf>> {
    // For a static program `ldd` fails and says so on stderr.
    let list = command("ldd").arg(program).output().context("failed to start ldd")?;
    let said = String::from_utf8_lossy(&list.stderr);
    if !list.status.success() && !said.contains("not a dynamic executable") {
        bail!("ldd {} failed: {}", program.display(), said.trim());
    }
    let mut found = BTreeMap::new();
    for line in String::from_utf8_lossy(&list.stdout).lines() {
        if let Some(path) = library(line)? {
            let file = fs::canonicalize(&path).with_context(|| format!("failed to find {}", path.display()))?;
            found.insert(path, file);
        }
    }
    Ok(found)
}

/// The library's path in a line of `ldd`, such as `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f…)`; the kernel's own has none.
fn library(line: &str) -> Result<Option<PathBuf>> {
    let line = line.trim();
    if line.ends_with("not found") {
        bail!("a library is missing: {line}");
    }
    let path = line.rsplit(" => ").next().unwrap_or(line).split(" (").next().unwrap_or_default();
    Ok(path.starts_with('/').then(|| path.into()))
}

fn import(cluster: &Cluster, image: &Image) -> Result<()> {
    let folder = cluster.make("images")?;
    let file = archive::write(&folder, image)?;
    output(
        command(packages::path("ctr")?)
            .arg("--address")
            .arg(cluster.containerd())
            .args(["--namespace", "k8s.io", "images", "import"])
            .arg(&file),
    )
    .with_context(|| format!("containerd did not take {}", image.reference))?;
    fs::remove_file(&file).with_context(|| format!("failed to remove {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ldd_are_understood() {
        let found = |line: &str| library(line).expect("a known line");
        assert_eq!(found("\tlinux-vdso.so.1 (0x00007ffd)"), None);
        assert_eq!(found("\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)"), Some("/lib/x86_64-linux-gnu/libc.so.6".into()));
        assert_eq!(found("\t/lib64/ld-linux-x86-64.so.2 (0x00007f)"), Some("/lib64/ld-linux-x86-64.so.2".into()));
        assert_eq!(found("\tstatically linked"), None);
        assert!(library("\tlibz.so.1 => not found").is_err());
    }
}
