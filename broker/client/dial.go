package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/gorilla/websocket"

	"github.com/fairlead-io/fairlead/broker/client/wsconn"
)

const dialTimeout = 10 * time.Second

// Dialer opens connections to one broker.
type Dialer struct {
	u   *url.URL
	tls *tls.Config
}

// ParseURL checks a broker's address: mqtt://host[:1883], mqtts://host[:8883],
// ws://host[:80]/path, wss://host[:443]/path or unix:///path. A bare host:port
// is mqtt. tlsConfig may be nil; it is used for mqtts and wss.
func ParseURL(raw string, tlsConfig *tls.Config) (*Dialer, error) {
	if raw == "" {
		return nil, errors.New("broker address is empty: want mqtt://host:port, ws://host:port/path or unix:///path")
	}
	if !strings.Contains(raw, "://") {
		raw = "mqtt://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("broker address %q: %w; want mqtt://host:port, ws://host:port/path or unix:///path", raw, err)
	}
	if u.User != nil {
		return nil, fmt.Errorf("broker address %q: leave the credentials out, they have options of their own", u.Redacted())
	}
	port := map[string]string{"mqtt": "1883", "tcp": "1883", "mqtts": "8883", "ws": "80", "wss": "443"}[u.Scheme]
	switch {
	case u.Scheme == "unix":
		if u.Path == "" || u.Host != "" {
			return nil, fmt.Errorf("broker address %q: want unix:///absolute/path", raw)
		}
		return &Dialer{u: u}, nil
	case port == "":
		return nil, fmt.Errorf("broker address %q: scheme %q is not one of mqtt, mqtts, ws, wss, unix", raw, u.Scheme)
	case u.Hostname() == "":
		return nil, fmt.Errorf("broker address %q has no host", raw)
	case u.Port() == "":
		u.Host = net.JoinHostPort(u.Hostname(), port)
	}
	if tlsConfig == nil {
		tlsConfig = &tls.Config{MinVersion: tls.VersionTLS13}
	}
	return &Dialer{u: u, tls: tlsConfig}, nil
}

// String is the address without secrets, for logs.
func (d *Dialer) String() string { return d.u.String() }

// Dial opens one connection.
func (d *Dialer) Dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	// MQTT's own keepalive finds a dead link; TCP's probes would double what an
	// idle link costs.
	nd := net.Dialer{KeepAlive: -1}
	switch d.u.Scheme {
	case "unix":
		return nd.DialContext(ctx, "unix", d.u.Path)
	case "mqtts":
		return (&tls.Dialer{NetDialer: &nd, Config: d.tls}).DialContext(ctx, "tcp", d.u.Host)
	case "ws", "wss":
		wd := websocket.Dialer{
			NetDialContext:   nd.DialContext,
			Proxy:            http.ProxyFromEnvironment,
			TLSClientConfig:  d.tls,
			Subprotocols:     []string{wsconn.Subprotocol},
			HandshakeTimeout: dialTimeout,
		}
		ws, resp, err := wd.DialContext(ctx, d.u.String(), nil)
		if resp != nil && resp.Body != nil {
			defer func() { _ = resp.Body.Close() }()
		}
		if err != nil {
			if resp != nil {
				return nil, fmt.Errorf("%w: the server answered %s", err, resp.Status)
			}
			return nil, err
		}
		return wsconn.New(ws), nil
	default:
		return nd.DialContext(ctx, "tcp", d.u.Host)
	}
}
