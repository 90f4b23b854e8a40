//! Programs from Debian that the cluster runs on: found, or installed when missing.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::process::{command, run, say};

/// Debian's packages, and a program by which each is known to be there.
const PACKAGES: &[(&str, &str)] = &[
    ("busybox-static", "busybox"),
    ("conntrack", "conntrack"),
    ("containerd", "containerd"),
    ("containernetworking-plugins", "/usr/lib/cni/bridge"),
    ("etcd-client", "etcdctl"),
    ("etcd-server", "etcd"),
    ("iproute2", "ip"),
    ("ipset", "ipset"),
    ("iptables", "iptables"),
    ("runc", "runc"),
    ("socat", "socat"),
    ("util-linux", "nsenter"),
];

/// Makes sure that every program is there.
///
/// # Errors
/// If some are missing and `apt-get` cannot install them; the message has the command that does.
pub(crate) fn ensure() -> Result<()> {
    let missing: Vec<&str> = PACKAGES.iter().filter(|(_, program)| locate(program).is_none()).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("apt-get install --no-install-recommends {}", missing.join(" "));
    if locate("apt-get").is_none() {
        bail!("missing programs, and no apt-get to install them; on Debian and Ubuntu the command is `{by_hand}`");
    }
    say(&format!("installing {}", missing.join(", ")));
    let apt = || {
        let mut apt = command("apt-get");
        // A service manager is told not to start what it finds installed: the cluster runs its own.
        apt.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
        apt
    };
    run(apt().args(["update", "--quiet", "--quiet"]))?;
    run(apt().args(["install", "--yes", "--quiet", "--no-install-recommends"]).args(&missing))
        .with_context(|| format!("packages could not be installed; try `{by_hand}`"))?;
    match PACKAGES.iter().find(|(_, program)| locate(program).is_none()) {
        Some((package, program)) => bail!("{program} is still missing after installing {package}"),
        None => Ok(()),
    }
}

/// Where the program of an installed package is.
///
/// # Errors
/// If it is not there.
pub(crate) fn path(program: &str) -> Result<PathBuf> {
    locate(program).with_context(|| format!("{program} was not found; `cargo xtask cluster up` installs it"))
}

fn locate(program: &str) -> Option<PathBuf> {
    if Path::new(program).is_absolute() {
        return Path::new(program).exists().then(|| program.into());
    }
    let own = env::var_os("PATH").unwrap_or_default();
    // A plain user's PATH has no folder of system programs.
    env::split_paths(&own).chain(["/usr/sbin".into(), "/sbin".into()]).map(|folder| folder.join(program)).find(|path| path.is_file())
}
