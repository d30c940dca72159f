package image

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// credential is what a registry is asked with.
type credential struct {
	username, password string
	// from is the secret it is in; nil is the node's own.
	from *secretRef
}

type secretRef struct {
	uid             types.UID
	namespace, name string
}

// hash tells credentials apart without keeping them.
func (c *credential) hash() [sha256.Size]byte {
	return sha256.Sum256([]byte(c.username + "\x00" + c.password))
}

// dockerHub is what the credentials of the default registry are filed under.
const dockerHub = "index.docker.io"

// dockerAuth is an entry of a Docker configuration, by the registry.
type dockerAuth struct {
	Username string `json:"username"`
	Password string `json:"password"`
	Auth     string `json:"auth"` // base64 of username:password, wins
}

// keyring is credentials by registry and path, such as fairlead.test/team.
type keyring map[string][]credential

// credentials gives what may be tried for a repository, the pod's secrets before
// the node's own, the most specific path first.
func credentials(dockerConfig string, secrets []*corev1.Secret, repository string) ([]credential, error) {
	pod, node := keyring{}, keyring{}
	for _, s := range secrets {
		var auths map[string]dockerAuth
		var err error
		if s.Type == corev1.SecretTypeDockerConfigJson {
			auths, err = configAuths(s.Data[corev1.DockerConfigJsonKey])
		} else if data := s.Data[corev1.DockerConfigKey]; s.Type == corev1.SecretTypeDockercfg && len(data) > 0 {
			err = json.Unmarshal(data, &auths)
		}
		if err == nil {
			err = pod.add(auths, &secretRef{s.UID, s.Namespace, s.Name})
		}
		if err != nil {
			return nil, fmt.Errorf("the pull secret %s/%s is no Docker configuration: %w", s.Namespace, s.Name, err)
		}
	}
	if dockerConfig != "" {
		data, err := os.ReadFile(dockerConfig)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("the node's Docker configuration: %w", err)
		}
		auths, err := configAuths(data)
		if err == nil {
			err = node.add(auths, nil)
		}
		if err != nil {
			return nil, fmt.Errorf("the node's Docker configuration %s: %w", dockerConfig, err)
		}
	}
	return append(pod.lookup(repository), node.lookup(repository)...), nil
}

// configAuths reads a config.json, which may be empty.
func configAuths(data []byte) (map[string]dockerAuth, error) {
	var c struct {
		Auths map[string]dockerAuth `json:"auths"`
	}
	if len(data) == 0 {
		return nil, nil
	}
	err := json.Unmarshal(data, &c)
	return c.Auths, err
}

func (k keyring) add(auths map[string]dockerAuth, from *secretRef) error {
	for where, a := range auths {
		c := credential{a.Username, a.Password, from}
		if a.Auth != "" {
			// With or without padding.
			plain, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(strings.TrimSpace(a.Auth), "="))
			if err != nil {
				return fmt.Errorf("auth of %q: it is not base64", where)
			}
			var ok bool
			if c.username, c.password, ok = strings.Cut(string(plain), ":"); !ok {
				return fmt.Errorf("auth of %q: it is not base64 of username:password", where)
			}
		}
		if !strings.HasPrefix(where, "https://") && !strings.HasPrefix(where, "http://") {
			where = "https://" + where
		}
		u, err := url.Parse(where)
		if err != nil {
			continue // as the kubelet: the other entries count
		}
		p := u.Path
		if strings.HasPrefix(p, "/v1/") || strings.HasPrefix(p, "/v2/") { // an API's address
			p = p[len("/v1"):]
		}
		if p == "/" {
			p = ""
		}
		k[u.Host+p] = append(k[u.Host+p], c)
	}
	return nil
}

func (k keyring) lookup(repository string) []credential {
	keys := make([]string, 0, len(k))
	for key := range k {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	slices.Reverse(keys) // longer paths before shorter ones
	var out []credential
	for _, key := range keys {
		if covers(key, repository) {
			out = append(out, k[key]...)
		}
	}
	if registry, _, _ := strings.Cut(repository, "/"); len(out) == 0 && registry == "docker.io" {
		return k[dockerHub]
	}
	return out
}

// covers tells whether credentials filed under key, whose host may have * in
// each of its parts, are for a repository.
func covers(key, repository string) bool {
	kHost, kPath, _ := strings.Cut(key, "/")
	host, p, _ := strings.Cut(repository, "/")
	kName, kPort := splitPort(kHost)
	hName, hPort := splitPort(host)
	ks, hs := strings.Split(kName, "."), strings.Split(hName, ".")
	if kPort != hPort || len(ks) != len(hs) || !strings.HasPrefix(p, kPath) {
		return false
	}
	for i := range ks {
		if ok, err := path.Match(ks[i], hs[i]); !ok || err != nil {
			return false
		}
	}
	return true
}

func splitPort(host string) (name, port string) {
	if name, port, err := net.SplitHostPort(host); err == nil {
		return name, port
	}
	return host, ""
}
