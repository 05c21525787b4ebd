# Ubuntu 24.04 with Docker, the credential helper of ECR, and the image already pulled. Machines from it start
# without fetching anything, so the network needs no way out (Egress=none in stack.yaml).
#
#   packer init deploy/ami.pkr.hcl
#   packer build -var region=REGION -var image=REPOSITORY:TAG -var instance_profile=PROFILE deploy/ami.pkr.hcl
#
# Then tell the settings which one it is, through an SSM parameter. Runs read it when they start, so a newer
# image is used by the next run without a change of settings:
#
#   aws ssm put-parameter --name /fruits-dask/ami --type String --data-type aws:ec2:image --overwrite --value \
#       "$(aws ec2 describe-images --owners self --filters Name=tag:fruits-dask:image,Values=REPOSITORY:TAG \
#           --query 'sort_by(Images, &CreationDate)[-1].ImageId' --output text)"

packer {
  required_version = ">= 1.11.0"
  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = "~> 1.3"
    }
  }
}

variable "region" {
  type        = string
  description = "Region of the stack; an AMI is of one region."
}

variable "image" {
  type        = string
  description = "REPOSITORY:TAG as in docker_image, pushed already."
}

variable "instance_profile" {
  type        = string
  description = "InstanceProfile of the stack, with which the image is pulled."
}

variable "source_parameter" {
  type        = string
  default     = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
  description = "SSM parameter with the AMI to start from. It must be an Ubuntu: the root device is /dev/sda1."
}

variable "subnet_id" {
  type        = string
  default     = null
  description = "Where to build: a subnet with a way to the internet that hands out public addresses. Default: the default network."
}

variable "instance_type" {
  type        = string
  default     = "c7i.large"
  description = "What to build on; it makes no difference to the AMI."
}

variable "volume_size" {
  type        = number
  default     = 20
  description = "GB. No machine can have a smaller disk than its AMI: filesystem_size of the settings must not be less."
}

data "amazon-parameterstore" "ubuntu" {
  name   = var.source_parameter
  region = var.region
}

locals {
  registry = split("/", var.image)[0]
  # Not fruits-dask:cluster, by which `cluster down` would take the machine that builds for a rented one.
  tags = {
    "Name"              = "fruits-dask"
    "fruits-dask:image" = var.image
  }
}

source "amazon-ebs" "fruits" {
  region               = var.region
  source_ami           = data.amazon-parameterstore.ubuntu.value
  instance_type        = var.instance_type
  iam_instance_profile = var.instance_profile
  subnet_id            = var.subnet_id

  ami_name        = "fruits-dask-${formatdate("YYYYMMDD-hhmmss", timestamp())}"
  ami_description = "Ubuntu 24.04 with ${var.image}"
  imds_support    = "v2.0" # machines from it have the newer metadata service, whoever starts them

  ssh_username              = "ubuntu"
  ssh_clear_authorized_keys = true
  # Packer opens port 22 for the build; by default to the world, with this only to where it runs.
  temporary_security_group_source_public_ip = true

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  launch_block_device_mappings {
    device_name           = "/dev/sda1"
    volume_size           = var.volume_size
    volume_type           = "gp3"
    encrypted             = true
    delete_on_termination = true
  }

  tags            = local.tags
  snapshot_tags   = local.tags
  run_tags        = local.tags
  run_volume_tags = local.tags
}

build {
  sources = ["source.amazon-ebs.fruits"]

  provisioner "shell" {
    execute_command = "sudo -H env {{ .Vars }} bash {{ .Path }}"
    inline = [
      "set -euxo pipefail",
      # 2 means that it is done, with warnings.
      "cloud-init status --wait || [ $? -eq 2 ]",
      "apt-get update",
      "DEBIAN_FRONTEND=noninteractive apt-get install -y docker.io amazon-ecr-credential-helper",
      # An upgrade of Docker in the middle of a run would end the container, and with it the machine. Machines
      # live for hours; they get their upgrades when the AMI is built again.
      "systemctl disable --now apt-daily.timer apt-daily-upgrade.timer unattended-upgrades.service",
      "install -d -m 0700 /root/.docker",
      "printf '{\"credHelpers\":{\"%s\":\"ecr-login\"}}' '${local.registry}' > /root/.docker/config.json",
      "docker pull '${var.image}'",
      "cloud-init clean --logs --seed --machine-id",
    ]
  }
}
