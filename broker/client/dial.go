package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/gorilla/websocket"

	"github.com/fairlead-io/fairlead/broker/client/wsconn"
	"github.com/fairlead-io/fairlead/broker/client/zconn"
)

const dialTimeout = 10 * time.Second

// Dialer opens connections to one broker.
type Dialer struct {
	u   *url.URL
	tls *tls.Config
}

// ParseURL checks a broker's address: mqtt://host[:1883], mqtts://host[:8883],
// ws://host[:80]/path, wss://host[:443]/path or unix:///path. A bare host:port
// is mqtt. tlsConfig, for mqtts and wss, may be nil: then the system's roots are
// trusted, and TLS 1.2 is the least that is spoken.
func ParseURL(raw string, tlsConfig *tls.Config) (*Dialer, error) {
	if raw == "" {
		return nil, errors.New("broker address is empty: want mqtt://host:port, ws://host:port/path or unix:///path")
	}
	if !strings.Contains(raw, "://") {
		raw = "mqtt://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil {
		var ue *url.Error // repeats the address
		if errors.As(err, &ue) {
			err = ue.Err
		}
		if at := strings.LastIndex(raw, "@"); at >= 0 { // credentials are not for logs
			scheme, _, _ := strings.Cut(raw, "://")
			return nil, fmt.Errorf("broker address %q is no URL: leave the credentials out, they have options of their own", scheme+"://…"+raw[at:])
		}
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
		if len(u.Path) > 107 {
			return nil, fmt.Errorf("broker address %q: the path has %d characters, the system allows 107", raw, len(u.Path))
		}
		return &Dialer{u: u}, nil
	case port == "":
		return nil, fmt.Errorf("broker address %q: scheme %q is not one of mqtt, mqtts, ws, wss, unix", raw, u.Scheme)
	case u.Hostname() == "":
		return nil, fmt.Errorf("broker address %q has no host", raw)
	case (u.Scheme == "mqtt" || u.Scheme == "tcp" || u.Scheme == "mqtts") && (strings.Trim(u.Path, "/") != "" || u.RawQuery != ""):
		return nil, fmt.Errorf("broker address %q: only ws and wss have a path; want mqtt://host:port or ws://host:port/path", raw)
	case u.Port() == "":
		u.Host = net.JoinHostPort(u.Hostname(), port)
	}
	if n, err := strconv.ParseUint(u.Port(), 10, 16); err != nil || n == 0 {
		return nil, fmt.Errorf("broker address %q: invalid port %q: want 1 to 65535", raw, u.Port())
	}
	if tlsConfig == nil {
		tlsConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if tlsConfig.ClientSessionCache == nil {
		// A reconnect that resumes is spared the certificates.
		tlsConfig = tlsConfig.Clone()
		tlsConfig.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	}
	return &Dialer{u: u, tls: tlsConfig}, nil
}

// String is the address without secrets, for logs.
func (d *Dialer) String() string { return d.u.String() }

// Dial opens one connection.
func (d *Dialer) Dial(ctx context.Context) (net.Conn, error) { return d.dial(ctx, false) }

// DialCompressed opens one connection, compressed where both sides can agree on
// that: over TLS and WebSocket, with a broker of ours. It is for links that are
// paid by the byte.
func (d *Dialer) DialCompressed(ctx context.Context) (net.Conn, error) { return d.dial(ctx, true) }

func (d *Dialer) dial(ctx context.Context, compress bool) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	// MQTT's own keepalive finds a dead link; TCP's probes would double what an
	// idle link costs.
	nd := net.Dialer{KeepAlive: -1}
	protocols := []string{wsconn.Subprotocol}
	if compress {
		protocols = []string{zconn.Protocol, wsconn.Subprotocol}
	}
	switch d.u.Scheme {
	case "unix":
		return nd.DialContext(ctx, "unix", d.u.Path)
	case "mqtts":
		cfg := d.tls.Clone()
		cfg.NextProtos = protocols
		c, err := (&tls.Dialer{NetDialer: &nd, Config: cfg}).DialContext(ctx, "tcp", d.u.Host)
		if err != nil {
			return nil, err
		}
		if c.(*tls.Conn).ConnectionState().NegotiatedProtocol == zconn.Protocol {
			return zconn.New(c), nil
		}
		return c, nil
	case "ws", "wss":
		wd := websocket.Dialer{
			NetDialContext:   nd.DialContext,
			Proxy:            http.ProxyFromEnvironment,
			TLSClientConfig:  d.tls,
			Subprotocols:     protocols,
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
		if ws.Subprotocol() == zconn.Protocol {
			return zconn.New(wsconn.New(ws)), nil
		}
		return wsconn.New(ws), nil
	default:
		return nd.DialContext(ctx, "tcp", d.u.Host)
	}
}
