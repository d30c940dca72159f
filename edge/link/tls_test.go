package link

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client/zconn"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Over TLS the link asks for compression, trusts whom it was told to, and works.
func TestOverTLS(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(c)
	var asked atomic.Bool
	cloud, err := broker.Open(broker.Options{
		Dir: t.TempDir(), Durability: broker.CloudDurability,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			if ci.Username == plant && string(ci.Password) == secret {
				return access.Identity{Role: access.Node, Name: plant}, nil
			}
			return access.Identity{}, errors.New("unknown node or wrong token")
		},
		TLS: &tls.Config{
			MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
			GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
				asked.Store(slices.Contains(h.SupportedProtos, zconn.Protocol))
				return nil, nil //nolint:nilnil // the listener's own
			},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cloud.Close(); err != nil {
			t.Error(err)
		}
	})
	addr, err := cloud.Listen("mqtts://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := openSite(t, t.TempDir())
	// The system's roots have not signed it.
	s.run(addr)
	eventually(t, "the certificate is refused", func() bool { return s.log.has("cannot connect", "certificate") })
	s.stop()
	if s.link.Connected() {
		t.Error("the link is up")
	}
	s.run(addr, func(cfg *Config) { cfg.TLS = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12} })
	shows(t, cloud, true)
	if !asked.Load() {
		t.Error("the link did not ask for compression")
	}
	x := topic.ReportedTwin(plant, "default", "pump-1", "speed")
	s.put(x, `{"v":40,"t":1790000000123}`)
	eventually(t, "the reading in the cloud", func() bool {
		p, ok := cloud.Retained(x)
		return ok && string(p) == `{"v":40,"t":1790000000123}`
	})
	s.stop() // and the goodbye gets through
	shows(t, cloud, false)
}
