//! llama-cpp-python as a yardstick: its environment, and perplexity side by side.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::{
    demo, model, paths,
    process::{command, output, say},
    python,
};

const PACKAGE: &str = "llama-cpp-python==0.3.36";
/// With the matrix unit of a Xeon that has one, this version ends by a segmentation fault in its first batch.
const WITHOUT_AMX: &str = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16";
const TEXT: &str = "tests/fixtures/text/wikitext2-valid-300k.txt";

/// Options of `peer-ppl`.
#[derive(Args)]
pub(crate) struct PplOptions {
    /// How many chunks of 512 tokens to compare.
    #[arg(long, default_value_t = 8)]
    chunks: usize,
}

/// Instructions that llama.cpp is compiled for.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Build {
    /// Those of this machine.
    Native,
    /// AVX2 and what comes with it, as it would be compiled on a machine without more.
    Avx2,
}

impl Build {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Avx2 => "avx2",
        }
    }
}

/// The interpreter with llama-cpp-python, compiled when it is missing (minutes; needs a C++ compiler and CMake).
///
/// # Errors
/// If Python is missing or the build fails.
pub(crate) fn llama_cpp(build: Build) -> Result<PathBuf> {
    let (folder, native) = match build {
        Build::Native => ("llama-cpp", "-DGGML_NATIVE=ON"),
        Build::Avx2 => ("llama-cpp-avx2", "-DGGML_NATIVE=OFF"),
    };
    let folder = paths::cache()?.join("peers").join(folder);
    let python = folder.join("bin").join("python");
    let has = Command::new(&python)
        .args(["-c", "import importlib.metadata as m; print('llama-cpp-python==' + m.version('llama_cpp_python'))"])
        .output();
    if has.is_ok_and(|o| o.status.success() && String::from_utf8_lossy(&o.stdout).trim() == PACKAGE) {
        return Ok(python);
    }
    // A wheel that was built with other flags is not for this one.
    python::environment(
        &folder,
        &[PACKAGE],
        &[
            ("PIP_NO_CACHE_DIR", "1"),
            ("CMAKE_ARGS", native),
            ("CFLAGS", WITHOUT_AMX),
            ("CXXFLAGS", WITHOUT_AMX),
            ("CMAKE_BUILD_PARALLEL_LEVEL", "2"),
        ],
    )
}

/// The command that runs the peer's script with `args`.
///
/// # Errors
/// As [`llama_cpp`].
pub(crate) fn script(build: Build, args: &[&str]) -> Result<Command> {
    let mut peer = command(llama_cpp(build)?);
    peer.arg(paths::root().join("xtask").join("peers").join("llama_cpp_peer.py")).args(args);
    Ok(peer)
}

/// Prints both perplexities of the first chunks of the test text and their ratio; `UPDATE_GOLDEN=1` records the peer's value for the tests.
///
/// # Errors
/// If a program fails, they score different numbers of tokens, or the ratio is further than 1 % from 1.
pub(crate) fn ppl(options: &PplOptions) -> Result<()> {
    let model = model::ensure()?;
    demo::build()?;
    let text = paths::root().join(TEXT);
    let chunks = options.chunks.to_string();
    let (model_arg, text_arg) = (model.to_string_lossy(), text.to_string_lossy());
    say(&format!("perplexity of the first {chunks} chunks: llama-cpp-python"));
    let peer: Value = serde_json::from_str(&output(&mut script(Build::Native, &["ppl", &model_arg, &text_arg, "--chunks", &chunks])?)?)?;
    say("the same: skein");
    let ours = output(command(paths::skein()?).args(["eval", "ppl", &model_arg, "--text", &text_arg, "--chunks", &chunks, "--json"]))?;
    let ours: Value = serde_json::from_str(&ours)?;
    let number = |v: &Value, field: &str| v[field].as_f64().with_context(|| format!("no number {field} in {v}"));
    let (a, b) = (number(&peer, "ppl")?, number(&ours, "ppl")?);
    println!("llama-cpp-python {a:.4}, skein {b:.4}, ratio {:.5}", b / a);
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|v| v == "1") {
        record(&peer)?;
    }
    if number(&peer, "tokens")? != number(&ours, "tokens")? {
        bail!("the peer scored {} tokens, skein {}", peer["tokens"], ours["tokens"]);
    }
    if (b / a - 1.0).abs() > 0.01 {
        bail!("perplexity {b:.4} is more than 1 % from the peer's {a:.4}");
    }
    Ok(())
}

/// Writes the golden file that `cargo xtask test` compares with.
fn record(peer: &Value) -> Result<()> {
    let path = paths::root().join("tests/golden/ppl-gemma3-270m.json");
    let golden = serde_json::json!({
        "model": format!("Gemma 3 270M Q4_K_M, sha256:{}", model::SHA256),
        "tool": PACKAGE,
        "command": "UPDATE_GOLDEN=1 cargo xtask peer-ppl",
        "text": TEXT,
        "context": 512,
        "chunks": peer["chunks"],
        "tokens": peer["tokens"],
        "ppl": peer["ppl"],
    });
    fs::write(&path, serde_json::to_string_pretty(&golden)? + "\n").with_context(|| format!("failed to write {}", path.display()))
}
