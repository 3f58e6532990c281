//! Credentials as stored by `docker login`.

use docker_credential::{CredentialRetrievalError, DockerCredential};
use oci_client::secrets::RegistryAuth;

/// Docker's key for the credentials of docker.io.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Failure to use configured credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// config.json or a helper's answer cannot be read.
    #[error("cannot read the credentials for {registry} from docker's config.json ({reason})")]
    Unusable {
        /// Host and port.
        registry: String,
        /// The fault, in one line.
        reason: String,
    },
    /// An OAuth refresh token, which oci-client cannot exchange.
    #[error(
        "docker's config.json has an identity token for {registry}, which is not supported: log in with a password or an access token"
    )]
    IdentityToken {
        /// Host and port.
        registry: String,
    },
}

/// Credentials for a registry, from `config.json` in `$DOCKER_CONFIG` or `~/.docker`, with its
/// `credHelpers` and `credsStore`. Anonymous if there are none.
///
/// # Errors
/// An unusable configuration: an anonymous attempt would only fail later, and say less.
pub fn credentials(registry: &str) -> Result<RegistryAuth, CredentialsError> {
    let key = if registry == "index.docker.io" { DOCKER_HUB } else { registry };
    let unusable = |reason: String| CredentialsError::Unusable { registry: registry.to_owned(), reason };
    match docker_credential::get_credential(key) {
        Ok(DockerCredential::UsernamePassword(user, password)) => Ok(RegistryAuth::Basic(user, password)),
        Ok(DockerCredential::IdentityToken(_)) => {
            Err(CredentialsError::IdentityToken { registry: registry.to_owned() })
        }
        Err(CredentialRetrievalError::NoCredentialConfigured | CredentialRetrievalError::ConfigNotFound) => {
            Ok(RegistryAuth::Anonymous)
        }
        // The library reports a missing file and invalid JSON alike.
        Err(CredentialRetrievalError::ConfigReadError) if !config_exists() => Ok(RegistryAuth::Anonymous),
        // Every helper of docker prints this on standard output for an unknown registry.
        Err(CredentialRetrievalError::HelperFailure { stdout, .. }) if stdout.contains("credentials not found") => {
            Ok(RegistryAuth::Anonymous)
        }
        Err(CredentialRetrievalError::HelperFailure { helper, stdout, stderr }) => {
            let said = if stderr.trim().is_empty() { stdout } else { stderr };
            Err(unusable(format!("{helper}: {}", crate::session::one_line(&said))))
        }
        Err(CredentialRetrievalError::HelperCommunicationError) => {
            Err(unusable("the configured credential helper cannot be run".to_owned()))
        }
        Err(error) => Err(unusable(error.to_string())),
    }
}

fn config_exists() -> bool {
    std::env::var_os("DOCKER_CONFIG")
        .map(std::path::PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".docker")))
        .is_some_and(|folder| folder.join("config.json").exists())
}
