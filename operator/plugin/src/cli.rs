//! Command-line arguments, and the client that they configure.

use std::path::PathBuf;

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::target::Target;

/// Consoles and logs of Bascule's virtual machines.
#[derive(Debug, clap::Parser)]
#[command(name = "kubectl-bascule", bin_name = "kubectl bascule", version)]
pub(crate) struct Args {
    /// Namespace of the virtual machine; that of the context by default
    #[arg(short, long, global = true)]
    namespace: Option<String>,
    /// Context of the kubeconfig
    #[arg(long, global = true)]
    context: Option<String>,
    /// The kubeconfig; $KUBECONFIG or ~/.kube/config by default
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Attach to the serial console. Ctrl-] leaves it. It comes back by itself where the guest moves to another node, or
    /// the connection is lost
    Console {
        /// Name of the VirtualMachine
        vm: String,
    },
    /// Print the last 256 KiB of serial output, also of a guest that has crashed
    Logs {
        /// Name of the VirtualMachine
        vm: String,
    },
}

impl Args {
    /// The API server's client and the virtual machine.
    pub(crate) async fn connect(&self) -> Result<(Client, Target)> {
        if rustls::crypto::ring::default_provider()
            .install_default()
            .is_err()
        {
            // One is installed already.
        }
        let kubeconfig = match &self.kubeconfig {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        };
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        let kubeconfig = kubeconfig.context("read the kubeconfig")?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
        let mut config = config.context("use the kubeconfig")?;
        // A console may be quiet for hours.
        config.read_timeout = None;
        let (Verb::Console { vm } | Verb::Logs { vm }) = &self.verb;
        let namespace = self.namespace.as_ref().unwrap_or(&config.default_namespace);
        let target = Target {
            namespace: namespace.clone(),
            // As in `kubectl get vm/web`.
            name: vm.rsplit('/').next().unwrap_or(vm).to_owned(),
        };
        let client = Client::try_from(config).context("configure the client")?;
        Ok((client, target))
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[test]
    fn the_namespace_may_be_named_before_and_after_the_verb() {
        Args::command().debug_assert();
        for line in [
            "kubectl-bascule -n shop console web",
            "kubectl-bascule console web --namespace shop",
            "kubectl-bascule logs web -n shop",
        ] {
            let args = Args::parse_from(line.split(' '));
            assert_eq!(args.namespace.as_deref(), Some("shop"), "{line}");
        }
    }
}
