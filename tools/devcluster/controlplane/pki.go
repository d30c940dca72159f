package controlplane

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"slices"
	"time"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	leafLife      = 365 * 24 * time.Hour
	// renewBefore is the rest of a leaf's life from which a start replaces it.
	renewBefore = 30 * 24 * time.Hour
)

// pki is what the parent itself needs of the certificates.
type pki struct {
	caPEM                        []byte
	admin                        keyPair
	controllerManager, scheduler keyPair
}

// keyPair is a certificate and its key in PEM.
type keyPair struct{ cert, key []byte }

// authority is a certificate authority kept in two files.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	keyPair
}

// leaf says what a certificate is for.
type leaf struct {
	user   string
	groups []string
	usage  x509.ExtKeyUsage
	dns    []string
	ips    []net.IP
}

// ensurePKI makes what is missing in Dir/pki and replaces leaves that no longer
// fit: soon expired, of another authority, for other names. Authorities and the
// service accounts' key are never replaced, so that kubeconfigs and tokens of
// earlier runs stay good.
func (f folder) ensurePKI(bind net.IP, now time.Time) (*pki, error) {
	ca, err := f.ensureAuthority("ca", "devcluster-ca", now)
	if err != nil {
		return nil, err
	}
	frontProxy, err := f.ensureAuthority("front-proxy-ca", "devcluster-front-proxy-ca", now)
	if err != nil {
		return nil, err
	}
	if err := f.ensureServiceAccountKey(); err != nil {
		return nil, err
	}
	client := func(user string, groups ...string) leaf {
		return leaf{user: user, groups: groups, usage: x509.ExtKeyUsageClientAuth}
	}
	ips := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, kubernetesServiceIP}
	if bind.IsUnspecified() {
		ips = append(ips, hostIPs()...)
	} else if !bind.IsLoopback() || !slices.ContainsFunc(ips, bind.Equal) {
		ips = append(ips, bind)
	}
	p := &pki{caPEM: ca.keyPair.cert}
	for _, l := range []struct {
		name string
		by   *authority
		leaf
		into *keyPair
	}{
		{"apiserver", ca, leaf{
			user:  "kube-apiserver",
			usage: x509.ExtKeyUsageServerAuth,
			dns:   []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
			ips:   ips,
		}, nil},
		{"apiserver-kubelet-client", ca, client("kube-apiserver-kubelet-client", "system:masters"), nil},
		{"front-proxy-client", frontProxy, client("front-proxy-client"), nil},
		{"admin", ca, client("devcluster-admin", "system:masters"), &p.admin},
		{"controller-manager", ca, client("system:kube-controller-manager"), &p.controllerManager},
		{"scheduler", ca, client("system:kube-scheduler"), &p.scheduler},
	} {
		pair, err := f.ensureLeaf(l.name, l.by, l.leaf, now)
		if err != nil {
			return nil, err
		}
		if l.into != nil {
			*l.into = pair
		}
	}
	return p, nil
}

// ensureAuthority reads an authority or makes it. One that is there and broken
// is an error: everything signed by it would silently stop working.
func (f folder) ensureAuthority(name, commonName string, now time.Time) (*authority, error) {
	pair, err := f.readPair(name)
	if errors.Is(err, fs.ErrNotExist) {
		return f.makeAuthority(name, commonName, now)
	}
	if err != nil {
		return nil, err
	}
	broken := func(why any) error {
		return fmt.Errorf("authority %s: %v; move the folder %s away to have everything in it made anew", f.path("pki", name+".crt"), why, f.path("pki"))
	}
	loaded, err := tls.X509KeyPair(pair.cert, pair.key)
	if err != nil {
		return nil, broken(err)
	}
	key, ok := loaded.PrivateKey.(crypto.Signer)
	if !ok || !loaded.Leaf.IsCA {
		return nil, broken("not an authority")
	}
	if now.Add(renewBefore).After(loaded.Leaf.NotAfter) {
		return nil, broken(fmt.Sprintf("valid until %s only", loaded.Leaf.NotAfter.Format(time.DateOnly)))
	}
	return &authority{cert: loaded.Leaf, key: key, keyPair: pair}, nil
}

func (f folder) makeAuthority(name, commonName string, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of authority %s: %w", name, err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: commonName},
		NotBefore:             now.Add(-time.Hour), // clocks of nodes that are a little behind
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	pair, cert, err := f.sign(name, template, template, key, key)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, keyPair: pair}, nil
}

func (f folder) ensureLeaf(name string, by *authority, l leaf, now time.Time) (keyPair, error) {
	pair, err := f.readPair(name)
	if err == nil && l.fits(pair, by, now) {
		return pair, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return keyPair{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keyPair{}, fmt.Errorf("make key of certificate %s: %w", name, err)
	}
	pair, _, err = f.sign(name, &x509.Certificate{
		Subject:               pkix.Name{CommonName: l.user, Organization: l.groups},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(leafLife),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{l.usage},
		BasicConstraintsValid: true,
		DNSNames:              l.dns,
		IPAddresses:           l.ips,
	}, by.cert, key, by.key)
	return pair, err
}

// fits reports whether a certificate of an earlier run can be used again.
func (l leaf) fits(pair keyPair, by *authority, now time.Time) bool {
	loaded, err := tls.X509KeyPair(pair.cert, pair.key)
	if err != nil {
		return false
	}
	c := loaded.Leaf
	return c.CheckSignatureFrom(by.cert) == nil &&
		now.After(c.NotBefore) && now.Add(renewBefore).Before(c.NotAfter) &&
		c.Subject.CommonName == l.user && slices.Equal(c.Subject.Organization, l.groups) &&
		slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{l.usage}) &&
		slices.Equal(c.DNSNames, l.dns) && slices.EqualFunc(c.IPAddresses, l.ips, net.IP.Equal)
}

// sign makes a certificate and writes it with its key, the key first: a crash in
// between leaves no certificate without its key.
func (f folder) sign(name string, template, parent *x509.Certificate, key, parentKey crypto.Signer) (keyPair, *x509.Certificate, error) {
	fail := func(err error) (keyPair, *x509.Certificate, error) {
		return keyPair{}, nil, fmt.Errorf("make certificate %s: %w", name, err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return fail(err)
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		return fail(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fail(err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return fail(err)
	}
	pair := keyPair{cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key: keyPEM}
	if err := errors.Join(f.write(pair.key, "pki", name+".key"), f.write(pair.cert, "pki", name+".crt")); err != nil {
		return fail(err)
	}
	return pair, cert, nil
}

func (f folder) readPair(name string) (keyPair, error) {
	cert, err := os.ReadFile(f.path("pki", name+".crt"))
	if err != nil {
		return keyPair{}, fmt.Errorf("read certificate: %w", err)
	}
	key, err := os.ReadFile(f.path("pki", name+".key"))
	if err != nil {
		return keyPair{}, fmt.Errorf("read key: %w", err)
	}
	return keyPair{cert: cert, key: key}, nil
}

// ensureServiceAccountKey makes the key that signs service account tokens.
func (f folder) ensureServiceAccountKey() error {
	_, err := os.Stat(f.path("pki", "sa.pub"))
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("service account key: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make service account key: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return fmt.Errorf("make service account key: %w", err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("make service account key: %w", err)
	}
	pubPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub})
	return errors.Join(f.write(keyPEM, "pki", "sa.key"), f.write(pubPEM, "pki", "sa.pub"))
}

// encodeKey gives PKCS #8.
func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
