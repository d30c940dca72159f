package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// writeConfigs writes what names the server's address: the kubeconfigs, and the
// authentication configuration.
func (f folder) writeConfigs(server string, p *pki) error {
	return errors.Join(
		f.write(kubeconfig(server, p.caPEM, "devcluster-admin", p.admin), "kubeconfig"),
		f.write(kubeconfig(server, p.caPEM, "controller-manager", p.controllerManager), "run", "controller-manager.kubeconfig"),
		f.write(kubeconfig(server, p.caPEM, "scheduler", p.scheduler), "run", "scheduler.kubeconfig"),
		f.write([]byte(authenticationConfig), "run", "authentication.json"),
	)
}

// kubeconfig is a kubeconfig that needs no other file.
func kubeconfig(server string, caPEM []byte, user string, pair keyPair) []byte {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: devcluster
clusters:
- name: devcluster
  cluster:
    server: %s
    certificate-authority-data: %s
users:
- name: %s
  user:
    client-certificate-data: %s
    client-key-data: %s
contexts:
- name: devcluster
  context:
    cluster: devcluster
    user: %s
`, server, b64(caPEM), user, b64(pair.cert), b64(pair.key), user)
}

// pollInterval is short against the seconds that a start takes, and costs one
// small request.
const pollInterval = 50 * time.Millisecond

// adminClient asks the API server as the administrator.
type adminClient struct {
	server string
	http   *http.Client
	// ctx ends the polls; close joins them.
	ctx    context.Context
	cancel context.CancelFunc
	polls  chan struct{} // one element per poll that runs; polls follow each other, so one is the bound
}

func newAdminClient(server string, p *pki) (*adminClient, error) {
	cert, err := tls.X509KeyPair(p.admin.cert, p.admin.key)
	if err != nil {
		return nil, fmt.Errorf("administrator's certificate: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.caPEM)
	ctx, cancel := context.WithCancel(context.Background())
	return &adminClient{
		server: server,
		http: &http.Client{
			Timeout: 10 * time.Second,
			// No proxy: the server is this machine.
			Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}},
		},
		ctx:    ctx,
		cancel: cancel,
		polls:  make(chan struct{}, 1),
	}, nil
}

// poll gives nil once all paths have answered 200.
func (c *adminClient) poll(paths ...string) <-chan error {
	return c.pollUntil(func() bool {
		for len(paths) > 0 {
			if code, _ := c.get(paths[0]); code != http.StatusOK {
				return false
			}
			paths = paths[1:]
		}
		return true
	})
}

// pollUntil gives nil once ok has said true.
func (c *adminClient) pollUntil(ok func() bool) <-chan error {
	done := make(chan error, 1)
	c.polls <- struct{}{}
	go func() {
		defer func() { <-c.polls }()
		for !ok() {
			select {
			case <-c.ctx.Done():
				return
			case <-time.After(pollInterval):
			}
		}
		done <- nil
	}()
	return done
}

// get gives the status code, 0 where there was no whole answer: the server is
// not listening yet, or being stopped.
func (c *adminClient) get(path string) (int, []byte) {
	req, err := http.NewRequestWithContext(c.ctx, http.MethodGet, c.server+path, nil)
	if err != nil {
		return 0, nil
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return 0, nil
	}
	return resp.StatusCode, body
}

// close ends a poll that still runs and waits for it.
func (c *adminClient) close() {
	c.cancel()
	c.polls <- struct{}{}
	c.http.CloseIdleConnections()
}
