//! Logging to stderr.

use tracing_subscriber::EnvFilter;

/// Format of log lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum LogFormat {
    /// Plain text.
    Text,
    /// JSON lines.
    Json,
}

/// Starts logging at `level`, which `RUST_LOG` overrides.
pub fn init(level: tracing::Level, format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new(format!("{level},kube=warn,kube_runtime=error,kube_client=error"))
    });
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails for a second subscriber in one process (tests).
    let _ = match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
